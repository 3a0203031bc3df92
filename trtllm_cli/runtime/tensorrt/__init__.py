"""Running TensorRT engines: on a GPU through TensorRT, or on any machine through the reference evaluator.

:mod:`~trtllm_cli.runtime.tensorrt.executor` drives one interface, TensorRT's own (execution contexts that are given
shapes and addresses). :mod:`~trtllm_cli.runtime.tensorrt.plan` provides it from a plan,
:mod:`~trtllm_cli.runtime.tensorrt.reference` from a network and torch on the CPU, so that everything but the kernels is
tested without a GPU.
"""
