"""`tokar sweep`: many runs from one command, with all state in a folder and no process that must stay alive."""
