"""The engine room: requests go in, text comes out. Import the modules by name; importing the room costs nothing."""
