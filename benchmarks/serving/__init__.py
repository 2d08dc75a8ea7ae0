"""What servers make of a rollback."""
