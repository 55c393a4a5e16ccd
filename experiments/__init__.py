"""Experiments, each runnable as ``python -m experiments.<name>``; ``--help`` explains."""

import importlib.util

if missing := [name for name in ("matplotlib", "tqdm", "tyro") if importlib.util.find_spec(name) is None]:
    raise ImportError(f'{", ".join(missing)} missing: pip install -e ".[experiments]"')
