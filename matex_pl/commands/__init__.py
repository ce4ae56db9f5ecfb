"""The commands of `matex`: one module each, whose `main` takes the arguments after the command's name."""
