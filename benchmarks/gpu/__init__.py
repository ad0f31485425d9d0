"""The GPU check, `python benchmarks/gpu_check.py`: stages (stages.py) of items (items.py).

The command holds the results (results.py, report.py) and the clock (session.py) and never touches the GPU. Items run in
processes of their own (processes.py, worker.py): one that crashes, hangs, or leaves the device in an error state costs
its row alone. It needs torch and Triton, nothing else; preflight.py needs not even these.
"""
