"""Files of this machine and of object stores: open, read, publish by rename."""
