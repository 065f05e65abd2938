"""S3 event notifications: from a message in any dialect and envelope to the events of its objects."""
