"""What keeps a client's update from the server and its rows from everyone: secure sums."""
