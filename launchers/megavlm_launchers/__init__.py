"""How the ranks of a run come to be: started here, or found in the environment that torchrun or SLURM made. No torch."""
