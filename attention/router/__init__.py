"""The error-budget router: measured errors, predictions, and a plan for each step."""
