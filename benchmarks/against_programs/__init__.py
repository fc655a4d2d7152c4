"""How benchmarks/against.py starts each program, reads its progress, and takes its weights."""
