"""A small generated suite and a tiny pretrained base model to try the library with."""
