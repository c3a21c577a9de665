"""What a person runs: training, preparing data, and what they are configured by."""

# Before any module here imports torchtitan (see `parallel`).
import parallel as parallel
