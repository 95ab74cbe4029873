"""The components of HPM-KD, one file each. They import the level below (losses, tasks, models), never each other."""
