VERSION = "0.1.0"  # the one place; setup.py adds +cu130 or +cpu
