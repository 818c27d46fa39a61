"""What an algorithm learns about a layer before it rounds it: the text, and the statistics of its inputs."""
