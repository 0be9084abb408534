"""What a user states: a trial, a job, published recipes."""
