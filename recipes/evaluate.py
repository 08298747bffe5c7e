"""Score a checkpoint:  accelerate launch recipes/evaluate.py <checkpoint> --dataset <digits, Hub id or folder>

Prints one number per line. The checkpoint is a folder (of a training run, or any that timm's `local-dir:` loads), a Hub
repository (`hf-hub:org/name`) or a model with a tag that is registered in timm (`resnet18_fmd.<tag>`).
"""
import argparse

import torch
from _data import VALIDATION_SPLITS, LabelledImages, Normalize, choose_split, eval_transform, open_dataset
from _measure import count_gmacs, device_name, peak_memory_mib, score, time_inference, use_all_cores
from _start import find_source, load_network
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from timm.data import resolve_model_data_config
from torch.utils.data import DataLoader

import fmd_timm  # noqa: F401, registers the models
from fmd_timm.scores import ies_infer, rcs_infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='folder, hf-hub:org/name, or registered model.tag')
    parser.add_argument('--dataset', required=True, help="'digits', a dataset id on the Hub, or a folder")
    parser.add_argument('--split', help=f'the first of {", ".join(VALIDATION_SPLITS)} by default')
    parser.add_argument('--image-column', help='column of images; found from the features')
    parser.add_argument('--label-column', help='column of labels; found from the features')
    parser.add_argument('--batch-size', type=int, default=256, help='images per step, over all processes (256)')
    parser.add_argument('--num-workers', type=int, default=4, help='data loading processes per process (4)')
    args = parser.parse_args()

    uses_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    accelerator = Accelerator(
        mixed_precision='bf16' if uses_bf16 else 'no', dataloader_config=DataLoaderConfiguration(split_batches=True))
    use_all_cores(accelerator)
    if args.batch_size < 1 or args.batch_size % accelerator.num_processes:
        raise SystemExit(
            f'--batch-size must be a multiple of the {accelerator.num_processes} processes, got {args.batch_size}')
    with accelerator.main_process_first():  # downloads once
        model = load_network(find_source(args.checkpoint, 'checkpoint'), 'checkpoint')
        dataset = open_dataset(args.dataset)
    split = choose_split(dataset, args.dataset, args.split, VALIDATION_SPLITS)
    data_config = resolve_model_data_config(model)
    images = LabelledImages(
        dataset[split], split, f'{args.dataset} split {split!r}', eval_transform(data_config), args.image_column,
        args.label_column,
    )
    if len(images.label_names) > model.num_classes:
        raise SystemExit(
            f'{images.name} has {len(images.label_names)} classes, {args.checkpoint} was trained for '
            f'{model.num_classes}'
        )

    loader = DataLoader(images, batch_size=args.batch_size, num_workers=args.num_workers)
    model, loader = accelerator.prepare(model, loader)
    normalize = Normalize(data_config['mean'], data_config['std']).to(accelerator.device)
    metrics = score(accelerator, model, loader, normalize, len(images))
    if accelerator.is_main_process:
        model, accuracy = accelerator.unwrap_model(model), metrics['top1'] / 100
        inference = time_inference(accelerator, model, data_config['input_size'], min(args.batch_size, len(images)))
        print(f'top-1: {metrics["top1"]:.2f}')
        print(f'top-5: {metrics["top5"]:.2f}')
        print(f'loss: {metrics["loss"]:.4f}')
        print(f'images: {len(images)}')
        print(f'ms per image at batch 1: {inference["infer_ms_per_image"]:.4g}')
        print(f'images/s at batch {inference["infer_batch"]}: {inference["infer_images_per_second"]:.4g}')
        print(f'ies_infer: {format_score(ies_infer(inference["infer_ms_per_image"], accuracy))}')
        print(f'rcs_infer: {format_score(rcs_infer(inference["infer_images_per_second"], accuracy))}')
        print(f'peak memory MiB: {peak_memory_mib(accelerator.device):.0f}')
        print(f'parameters: {sum(p.numel() for p in model.parameters())}')
        print(f'GMACs: {count_gmacs(model, data_config["input_size"]):.4g}')
        print(f'device: {accelerator.num_processes} x {device_name(accelerator.device)}')
        print(f'precision: {"bf16" if uses_bf16 else "fp32"}')
    accelerator.end_training()


def format_score(value: float | None) -> str:
    return 'none (no image was right)' if value is None else f'{value:.4g}'


if __name__ == '__main__':
    main()
