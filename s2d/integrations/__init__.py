"""Callbacks for training libraries, each a few lines on top of :class:`s2d.SelectiveSpectralDecay`.

``s2d.integrations.transformers`` and ``s2d.integrations.lightning`` import their library, so import them by name;
nothing is imported from here. Accelerate and timm need no code of ours: see ``examples/``.
"""
