"""The parts of gpu.py: what each measures (steps, checks, training), its process, and the report of it all."""
