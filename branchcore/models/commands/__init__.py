"""How the command line drives real models: flags, training, samples, pictures."""
