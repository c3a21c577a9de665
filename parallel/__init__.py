"""How the model is laid over ranks: meshes, tensor parallelism, FSDP2, checkpoints."""

# torchtitan decides at import which device it runs on; on a CPU this must have spoken before.
from parallel import device as device
