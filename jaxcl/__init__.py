"""jaxcl: models that keep learning and stay small, as pure JAX functions.

Import the module you need: ``from jaxcl import bottleneck``. From the ground up they are ``typing``, ``files``,
``trees``, ``threefry``, ``nearest``, ``reconstruction``, ``quantize``, ``tokenizer``, ``masked_prior``, ``bottleneck``,
``masks``, ``gaussian``, ``coding``, ``adapters``, ``continual``, ``nets``, ``data`` and ``report``.
"""
