"""Long runs behind the chapters of Part IV: ``python -m experiments NAME``."""
