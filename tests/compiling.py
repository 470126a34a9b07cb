"""How tests compile: fast. It is most of their time, for programs that are run once on small arrays."""

import importlib.metadata

# Half of the time, for slower programs; names that XLA reads in XLA_FLAGS, as it first compiles.
FAST = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib") < "0.11":
    FAST += " --xla_cpu_use_fusion_emitters=false"
