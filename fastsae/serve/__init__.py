"""What servers share: metrics and the audit log."""
