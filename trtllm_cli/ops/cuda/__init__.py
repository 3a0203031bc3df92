"""Our CUDA kernels as torch custom operators (``torch.ops.trtllm_cli.*``).

A family is one module: the mirror of its C parameter structs, the operators with their shape functions, and the
checks. Its plain torch twin, which runs the same operator on CPU tensors and is what the kernels are tested against,
lies beside it in ``<family>_twin.py``.
"""
