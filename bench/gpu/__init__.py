"""The GPU run in one command, ``python -m bench.gpu``: docs/gpu-run.md.

``plan`` says which jobs there are, ``supervise`` runs one of them and survives what it does, ``record`` is the run's
JSON, ``child`` and ``child_pytest`` are the processes that touch the device and say in a ``journal`` what they are at,
``pack`` prepares what a machine without a network needs.
"""

import sys

from bench.checkout import ROOT
from bench.gpu.pack import SITE

# The checkout measures itself. Carried packages come last: they fill gaps, and hide nothing that the machine has.
sys.path[:0] = [str(ROOT / "python")]
if SITE.is_dir():
    sys.path.append(str(SITE))
