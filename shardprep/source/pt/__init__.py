"""What a `.pt` file holds, read without torch and without running code of the file."""
