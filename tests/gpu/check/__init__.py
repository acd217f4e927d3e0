"""What a first GPU is asked, part by part: each is timed, and written as JSON as soon as it is known (check.sh)."""
