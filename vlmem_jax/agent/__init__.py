"""The agent around a model: it watches hours of video, keeps a memory of them, and answers from that memory."""
