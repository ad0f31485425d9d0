"""Images in: finding files, reading each kind, bringing any image to one form. Label maps of volumes out."""
