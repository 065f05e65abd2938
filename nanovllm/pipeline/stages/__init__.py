"""What happens to a job, one stage a file."""
