"""Models of geometry, frozen: points, cameras and tokens of the frames of a video."""
