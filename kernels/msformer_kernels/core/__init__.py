"""What every operator is made with: its declaration and registration, the choice of a backend, checks of arguments."""
