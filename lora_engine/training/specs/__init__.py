"""What a person may set about training, by subject; torch-free. `training.spec` puts them together."""
