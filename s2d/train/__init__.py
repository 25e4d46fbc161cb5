"""Training entry points on the ecosystem's own parts: timm's data pipeline, accelerate, the Hugging Face Trainer.

The command is ``s2d train``; from Python, :func:`s2d.train.vision.train_vision` and
:func:`s2d.train.language.train_language` do the same. Both import their libraries where they are used.
"""
