"""The commands of `matex`, a file each with `main`, which takes the words after the command's name."""
