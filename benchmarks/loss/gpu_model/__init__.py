"""What the Triton kernels compile to and how long they should take, worked out without a GPU.

- `python -m benchmarks.loss.gpu_model.compiled_kernels`: registers, spills and instruction mix.
- `python -m benchmarks.loss.gpu_model.cost_model`: predicted times and limiting units.
- `python -m benchmarks.loss.gpu_model --against FILE`: the predictions against measured times.
"""
