"""What is measured, each in a process of its own. Rivals run these files in their own venvs: numpy and themselves."""
