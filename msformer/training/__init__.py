"""One small network for a folder of images, trained without masks, and what is done with it.

`saved` keeps a trained network in a folder and reads it again; `predict` finds the object in an image with it.
"""
