"""What turns records into something that people read: tables, statistics, reports."""
