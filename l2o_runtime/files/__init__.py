"""Files: rules and exported rules, how they are read and written, and what is refused."""
