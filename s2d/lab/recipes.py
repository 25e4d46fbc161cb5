"""The named recipes of the laptop scale: every hyper-parameter here was chosen on the validation split (see ``tuning.py``)."""
