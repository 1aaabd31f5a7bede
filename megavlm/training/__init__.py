"""Training: builders, optimizer groups, schedule, step, loop, signals, stages. Start reading at loop.py."""
