"""Jobs of a Slurm cluster: written, submitted, watched, and what their processes run."""
