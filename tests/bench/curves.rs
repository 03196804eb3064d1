//! The cost of a message as the work grows, as curves.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;
use serde_json::{Value, json};
use support::guests;
use support::postgres::Cluster;

use crate::contenders::{Contender, Implementation, STATE, Size, by_name};
use crate::stage;
use crate::statistics::median;

/// A curve: messages per second by a number.
struct Curve {
    title: &'static str,
    points: &'static [usize],
    /// Changes the contender to one point.
    apply: fn(&mut Contender, usize),
}

const CURVES: &[Curve] = &[
    Curve {
        title: "messages of a batch",
        points: &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
        apply: |contender, batch| {
            // Lives as long as the process, as the settings of all contenders do.
            let settings = format!("batch = {batch}\n{STATE}").leak();
            contender.implementation = Implementation::Host { settings };
        },
    },
    Curve {
        title: "keys",
        points: &[1, 10, 100, 1_000, 10_000, 100_000],
        apply: |contender, keys| contender.size.keys = keys,
    },
    Curve {
        title: "bytes of padding, in and out",
        points: &[100, 1_000, 4_000, 16_000, 64_000, 256_000],
        apply: |contender, padding| contender.size.padding = padding,
    },
    Curve {
        title: "statements of a message",
        points: &[0, 1, 2, 3, 5, 10],
        apply: |contender, statements| contender.size.statements = statements,
    },
    Curve {
        title: "rows in the inbox",
        points: &[1, 100_000, 1_000_000, 10_000_000],
        apply: |contender, inbox| contender.size.inbox = inbox,
    },
    Curve {
        title: "hosts on one database",
        points: &[1, 2, 3, 4],
        apply: |contender, hosts| contender.size.hosts = hosts,
    },
];

/// All messages of a measurement together have this many bytes at most.
const BYTES_MAX: usize = 200 << 20;

/// Measures all curves, and draws them.
pub async fn measure(
    cluster: &Cluster,
    messages: usize,
    rounds: usize,
    drawing: &Path,
) -> Result<Value> {
    tokio::task::spawn_blocking(guests::component).await??;
    let mut curves = Vec::new();
    for curve in CURVES {
        let mut rates: Vec<Vec<f64>> = vec![Vec::new(); curve.points.len()];
        for round in 1..=rounds {
            for (point, rates) in curve.points.iter().zip(&mut rates) {
                let mut contender = *by_name("state").context("find the contender")?;
                (curve.apply)(&mut contender, *point);
                let messages = messages.min(BYTES_MAX / contender.size.padding.max(1));
                let one = stage::measure(&contender, cluster, messages)
                    .await
                    .with_context(|| format!("{}: {point}", curve.title))?;
                let title = curve.title;
                println!(
                    "round {round}  {title} {point}: {:.0} messages/s; {}",
                    one.rate,
                    one.costs()
                );
                rates.push(one.rate);
            }
        }
        let points: Vec<(f64, f64)> = curve
            .points
            .iter()
            .zip(&rates)
            .map(|(point, rates)| (*point as f64, median(rates)))
            .collect();
        curves.push((curve.title, points, rates));
    }
    let drawn: Vec<(&str, &[(f64, f64)])> = curves
        .iter()
        .map(|(title, points, _)| (*title, points.as_slice()))
        .collect();
    draw(&drawn, drawing).context("draw the curves")?;
    let usual = Size::USUAL;
    let rows = curves
        .iter()
        .map(|(title, points, rates)| json!({ "title": title, "points": points, "rounds": rates }));
    Ok(json!({
        "messages": messages, "usual_keys": usual.keys, "curves": rows.collect::<Vec<_>>(),
    }))
}

/// Draws the curves side by side, each with a logarithmic axis and from zero.
fn draw(curves: &[(&str, &[(f64, f64)])], path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, (960, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((2, curves.len().div_ceil(2)));
    for ((title, points), area) in curves.iter().zip(&areas) {
        let least = points.first().map_or(1.0, |(x, _)| x.max(1.0));
        let most = points.last().map_or(10.0, |(x, _)| x.max(least * 2.0));
        let highest = points.iter().fold(1.0, |most: f64, (_, y)| most.max(*y));
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .caption(title, ("sans-serif", 15))
            .x_label_area_size(30)
            .y_label_area_size(56)
            .build_cartesian_2d((least..most).log_scale(), 0.0..highest * 1.1)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(4)
            .y_labels(5)
            .y_desc("messages/s")
            .draw()?;
        let line = points.iter().map(|(x, y)| (x.max(1.0), *y));
        chart.draw_series(LineSeries::new(line.clone(), BLUE.stroke_width(2)))?;
        chart.draw_series(line.map(|point| Circle::new(point, 3, BLUE.filled())))?;
    }
    root.present()?;
    Ok(())
}
