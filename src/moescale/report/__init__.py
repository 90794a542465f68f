"""What people see of a plan and of a run, in the terminal and as a page."""
