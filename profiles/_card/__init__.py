"""The parts of gpu.py: what each measures (checks, steps), its process (jobs), and the report of it all."""
