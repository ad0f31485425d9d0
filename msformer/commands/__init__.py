"""The commands of ``msformer``, a file each; `msformer.cli` puts them together.

Heavy imports happen inside the commands, so that help and errors of usage come at once.
"""
