"""The quality study behind ``bench/train_ra_mla.py``: arms, trainer, report."""
