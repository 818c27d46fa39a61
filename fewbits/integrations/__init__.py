"""Where fewbits meets other packages' extension points."""
