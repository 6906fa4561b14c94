"""Videos: enlarged frame by frame, with sound and subtitles (docs/video.md); needs PyAV, ``ppsr[video]``."""

from ppsr.video.enlarge import VideoStats, check_video, upscale_video

__all__ = ['VideoStats', 'check_video', 'upscale_video']
